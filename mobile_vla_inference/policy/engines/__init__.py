"""How one policy step runs: transformers' modules, flat arithmetic with torch or Triton, or a captured CUDA graph."""
