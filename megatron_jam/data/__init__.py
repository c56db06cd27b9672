"""Indexed sets, the CM3 objective, packing, blending and instruction samples."""
