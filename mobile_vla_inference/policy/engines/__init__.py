"""How one policy step runs: the reference modules, the flat arithmetic, a captured CUDA graph, and their operations."""
