"""Devices and processes as one program: the mesh, what processes do together, compiled programs."""
