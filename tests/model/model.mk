# Test models: small, random, the same bytes everywhere (scripts/make_model.py).
TEST_MODELS := build/models/ready
$(TEST_MODELS): scripts/make_model.py $(VENV)/ready
	$(call say,MODEL,$(@D))
	$Q $(PYTEST) $< --tests $(@D) && touch $@

test-model: $B/test-model $(TEST_MODELS)
	CK_FORK=no timeout 900 $B/test-model
.PHONY: test-model
