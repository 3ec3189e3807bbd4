# Speed of the CPU back end beside the ceilings of this machine.  oneDNN is the
# yardstick for matrix products and is needed by nothing else.
$B/bench-cpu: $B/tests/bench/bench_cpu.o $(LIB)
	$(call say,LD,$@)
	$Q$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -ldnnl
bench-cpu: $B/bench-cpu
	$B/bench-cpu $(ARGS)
.PHONY: bench-cpu
