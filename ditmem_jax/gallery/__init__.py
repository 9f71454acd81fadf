"""A bank as a page to look into and to change: `ditmem bank serve`."""
