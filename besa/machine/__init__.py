"""Device and memory, processes under torchrun, files, checks of fields, provenance: no pruning."""
