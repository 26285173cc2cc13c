"""Device and memory, processes under torchrun, files: nothing here knows of pruning."""
