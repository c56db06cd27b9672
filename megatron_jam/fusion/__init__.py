"""JAM-Uniform, JAM-Width and JAM-Cross as functions from folders to a folder."""
