"""Values for each model: files with a get_config(), for --config NAME or --config FILE.py."""
