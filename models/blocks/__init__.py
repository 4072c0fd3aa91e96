"""The sub-blocks, one file each: the modules that compute what their cards declare."""
