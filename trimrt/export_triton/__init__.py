"""Engine packages as models of a Triton model repository: `trimrt export-triton`."""
