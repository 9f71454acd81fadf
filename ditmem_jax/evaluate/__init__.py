"""What a trained memory is worth: measures that validation takes while it trains, and others take after."""
