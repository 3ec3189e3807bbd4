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
$B/bench-locality: $B/tests/bench/bench_locality.o $B/tests/support/model_runner.o \
                   $B/tests/support/backend_fixture.o $(LIB)
	$(call say,LD,$@)
	$Q$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -lcheck -lsubunit -lrt -lm
# Masks of structured output, on the host whatever the device.
$B/bench-grammar: $B/tests/bench/bench_grammar.o $B/tests/support/random_data.o $(LIB)
	$(call say,LD,$@)
	$Q$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
.PHONY: bench-cpu

# The tables of docs/RESULTS.md.  numpy makes models; PyTorch, where it is, is the baseline.
evidence: $B/asynctlsd $(if $(CU),bench-gpu-programs)
	$Q p=$(PY); $$p -c 'import numpy' 2>/dev/null || \
	    { $(MAKE) --no-print-directory $(VENV)/ready && p=$(PYTEST); }; \
	$$p scripts/evidence.py --bin $B $(ARGS)
.PHONY: evidence

# Speed of the CUDA back end; where there is no GPU these say so.
ifneq ($(CU),)
BENCH_GPU := bench-gpu bench-gpu-two-level bench-gpu-step bench-gpu-offload
$B/bench-gpu: $B/tests/bench/bench_gpu.o
$B/bench-gpu-two-level: $B/tests/bench/bench_gpu_two_level.o
$B/bench-gpu-step: $B/tests/bench/bench_gpu_step.o $B/tests/bench/decode_steps.o
$B/bench-gpu-offload: $B/tests/bench/bench_gpu_offload.o $B/tests/bench/decode_steps.o \
                      $B/tests/bench/empty_rows.cu.o
$(BENCH_GPU:%=$B/%): $B/tests/bench/memory_rate.cu.o $B/tests/support/gpu_bench.o \
                     $B/tests/support/random_data.o $(LIB)
	$(call say,LD,$@)
	$Q$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
bench-gpu-programs: $(BENCH_GPU:%=$B/%)
# With the Python that has PyTorch, or else without the baseline.
bench-gpu: bench-gpu-programs $B/asynctlsd $(VENV)/ready
	$(shell $(PY) -c 'import numpy, torch' 2>/dev/null && echo $(PY) || echo $(PYTEST)) scripts/bench_gpu.py --bin $B $(ARGS)
.PHONY: bench-gpu bench-gpu-programs
endif
