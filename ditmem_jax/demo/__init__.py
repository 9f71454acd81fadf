"""The demo: does a memory teach a frozen video model the laws of planets that neither has seen? `ditmem demo`."""
