# The GPU tests on machines without a GPU: tests/emulator in place of the CUDA libraries, which
# runs the PTX that nvcc puts into the objects.  These are built by this Makefile again, in a tree
# of their own: EMULATED says so.  SAN=... is a sanitizer for all that runs on the host.
EMULATED_TREE := build-emulated$(if $(SAN),-$(subst $(comma),-,$(SAN)))

# Cases, and the compute capabilities that each is run for.  What is not here is made for the speed
# of a GPU and takes from eight minutes (gpu_attend, gpu_lagged) to hours; name it in EMULATED_CASES.
EMULATED_CASES ?= 90/gpu_hot_rows 90/gpu_prefill 90/gpu_sample 90/gpu_rope_store 90/gpu_latent \
                  90/gpu_two_level 80/gpu_latent 89/gpu_prefill 90/gpu_elementwise \
                  90/gpu_copies

ifdef EMULATED
NVFLAGS := -std=c++17 -O3 -I. -MD -MP -Werror all-warnings -Xcompiler -Wall,-Wextra --no-compress \
           $(foreach a,90 80,-gencode arch=compute_$a$(comma)code=compute_$a)
LDLIBS  := $(filter-out -L$(CUDA_LIB) -lcu%,$(LDLIBS))
$B/tests/emulator/ptx_%.o: ISA := -O3
$B/tests/emulator/%.o: CPPFLAGS += -isystem $(dir $(NVCC))../include
$B/test-gpu: $(patsubst %.c,$B/%.o,$(wildcard tests/emulator/*.c))
emulated/%: $B/test-gpu
	$Q EMULATED_CC=$(*D) CK_RUN_CASE=$(*F) CK_DEFAULT_TIMEOUT=1800 timeout 3600 $< >$B/$(*D)-$(*F).log 2>&1; \
	    st=$$?; [ $$st = 0 ] || cat $B/$(*D)-$(*F).log; tail -n 1 $B/$(*D)-$(*F).log | sed 's,^,$* ,'; exit $$st
endif

# Where there is no nvcc there is nothing to run.
test-emulated:
ifneq ($(NVCC),)
	@$(MAKE) --no-print-directory -j$(shell nproc) EMULATED=1 CUDA=1 B=$(EMULATED_TREE) \
	    $(EMULATED_CASES:%=emulated/%)
else
	@echo "skip: GPU tests on the emulator (no nvcc)"
endif
.PHONY: test-emulated
