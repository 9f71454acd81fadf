"""The tiny Wan in original names; ../README.md tells how it was trained."""
