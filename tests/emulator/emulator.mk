# The GPU tests on machines without a GPU: tests/emulator in place of the CUDA libraries, which
# runs the PTX that nvcc puts into the objects.  These are built by this Makefile again, in a tree
# of their own: EMULATED says so.  EMULATED_CC=80 at run time is another device (cudart.h), SAN=...
# a sanitizer for all that runs on the host.
EMULATED_TREE := build-emulated$(if $(SAN),-$(subst $(comma),-,$(SAN)))

ifdef EMULATED
NVFLAGS := -std=c++17 -O3 -I. -MD -MP -Werror all-warnings -Xcompiler -Wall,-Wextra --no-compress \
           $(foreach a,90 80,-gencode arch=compute_$a$(comma)code=compute_$a)
LDLIBS  := $(filter-out -L$(CUDA_LIB) -lcu%,$(LDLIBS))
$B/tests/emulator/ptx_%.o: ISA := -O3
$B/tests/emulator/%.o: CPPFLAGS += -isystem $(dir $(NVCC))../include
# Sums stay in registers where loops are unrolled.
$B/tests/emulator/cublaslt.o: ISA := -O3
$B/test-gpu: $(patsubst %.c,$B/%.o,$(wildcard tests/emulator/*.c))
endif

# Where there is no nvcc there is nothing to run.
test-emulated:
ifneq ($(NVCC),)
	$Q$(MAKE) --no-print-directory EMULATED=1 CUDA=1 B=$(EMULATED_TREE) $(EMULATED_TREE)/test-gpu
	CK_FORK=no timeout 3600 $(EMULATED_TREE)/test-gpu
else
	@echo "skip: GPU tests on the emulator (no nvcc)"
endif
.PHONY: test-emulated
