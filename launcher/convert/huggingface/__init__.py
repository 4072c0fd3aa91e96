"""Folders of Hugging Face's, one file for each kind of family: configs and weights, both ways."""
