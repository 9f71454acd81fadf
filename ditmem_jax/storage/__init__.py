"""Files: whole or absent, safetensors, torch files; converted weights, trained encoders."""
