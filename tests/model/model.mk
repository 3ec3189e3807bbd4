# Test models: small, random, the same bytes everywhere (scripts/make_model.py).
TEST_MODELS := build/models/ready
$(TEST_MODELS): scripts/make_model.py $(VENV)/ready
	$(call say,MODEL,$(@D))
	$Q $(PYTEST) $< --tests $(@D) && touch $@

test-model: $B/test-model $(TEST_MODELS)
	CK_FORK=no timeout 900 $B/test-model
# Contexts of up to LONG_TOKENS tokens through small pools: minutes for 16,000 on two cores, hours
# for 100,000.  On a GPU test-gpu has them.
LONG_TOKENS ?= 16000
test-long: $B/test-model $(TEST_MODELS)
	LONG_TOKENS=$(LONG_TOKENS) CK_RUN_CASE=engine_long CK_FORK=no $B/test-model
.PHONY: test-model test-long
