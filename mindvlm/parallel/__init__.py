"""Training with several processes: a mesh of data-parallel and tensor-parallel ranks that use explicit collectives."""
