"""Measures of what a trained memory is worth: some that validation takes while it trains, and others take after."""
