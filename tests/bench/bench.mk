# Speed of the CPU back end beside the ceilings of this machine.  oneDNN is the
# yardstick for matrix products and is needed by nothing else.
$B/bench-cpu: $B/tests/bench/bench_cpu.o $(LIB)
	$(call say,LD,$@)
	$Q$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -ldnnl
$B/bench-attention: $B/tests/bench/bench_attention.o $B/tests/support/random_data.o $(LIB)
	$(call say,LD,$@)
	$Q$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
bench-cpu: $B/bench-cpu $B/bench-attention
	$B/bench-cpu $(ARGS)
	$B/bench-attention
.PHONY: bench-cpu

# Speed of the CUDA back end; where there is no GPU these say so.
ifneq ($(CU),)
$B/bench-gpu: $B/tests/bench/bench_gpu.o
$B/bench-gpu-two-level: $B/tests/bench/bench_gpu_two_level.o
$B/bench-gpu $B/bench-gpu-two-level: $B/tests/support/gpu_bench.o $B/tests/support/random_data.o $(LIB)
	$(call say,LD,$@)
	$Q$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
bench-gpu-programs: $B/bench-gpu $B/bench-gpu-two-level
bench-gpu: bench-gpu-programs
	$B/bench-gpu
	$B/bench-gpu-two-level
.PHONY: bench-gpu bench-gpu-programs
endif
