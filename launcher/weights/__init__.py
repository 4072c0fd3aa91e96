"""Weights from elsewhere: a run, a checkpoint or a Hugging Face folder, read box by box.

source   one interface to tensors by canonical name, whatever their files
fill     fills a sharded model from a source; no rank holds the whole model
convert  the verb: writes a source in another format
progress the folder of a conversion, and its finished files
stream   reads, writes and checks at the same time
direct   safetensors files past the system's cache
fold     σReparam as plain weights
logits   of what was written, beside those of its source
peer     transformers in plain PyTorch
target   what a format is to `convert`
hf       Hugging Face folders as a target
native   our own checkpoints as a target
"""
