"""Videos on disk, encoded records, and the streams of batches that training reads."""
