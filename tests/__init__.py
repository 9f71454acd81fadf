# Tests compile hundreds of programs and run each a few times: without LLVM's optimisations that takes half the time.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
