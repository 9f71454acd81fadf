"""The bank of reference videos: which of them tell about a prompt."""
