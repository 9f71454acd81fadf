"""Frames that a clip is to hold, such as a given first one: the kinds of telling a transformer of them."""
