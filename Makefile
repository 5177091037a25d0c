# Every target first makes .venv with what it needs: `make train`, `make demo`, `make sweep`, `make test`, `make lint`.
# `make PYTHON=... TARGET` checks that Python each time and remakes .venv if another one made it.
# `make test-long` kills more runs and tries more command lines; `make test-pythons` tests dmc2gym on every Python that is here.

VENV := .venv

# A million environment steps, with 5.5 GB of replay. The authors' script makes a million decisions, with 22 GB.
TRAIN_ARGS := --resume --domain_name cheetah --task_name run --encoder_type pixel --decoder_type pixel --action_repeat 4 \
	--num_train_steps 250000 --save_video --save_tb --work_dir ./log --seed 1
DEMO_ARGS := --domain_name cartpole --task_name swingup --encoder_type pixel --decoder_type pixel --action_repeat 8 \
	--num_train_steps 500 --init_steps 150 --eval_freq 250 --num_eval_episodes 2 --batch_size 32 --hidden_dim 256 \
	--image_size 64 --num_filters 16 --save_video --save_tb --work_dir ./demo_log/$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: train demo sweep test test-long test-pythons lint clean always

train: $(VENV)/installed
	$(VENV)/bin/python train.py $(TRAIN_ARGS) $(ARGS)

demo: $(VENV)/installed
	$(VENV)/bin/python train.py $(DEMO_ARGS)
	@echo "Now look at it: $(VENV)/bin/tensorboard --logdir demo_log"

sweep: $(VENV)/installed-sweep
	$(VENV)/bin/python sweep.py $(ARGS)

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 2

test-long: $(VENV)/installed-dev
	LONG_TESTS=1 $(VENV)/bin/python -m pytest -n 2

test-pythons:
	.ci/pythons

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/installed: requirements.txt requirements-env.txt requirements-suite.txt setup.sh $(if $(PYTHON),always)
	./setup.sh $(VENV) requirements.txt $(PYTHON)
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/installed-sweep: requirements-sweep.txt $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -r requirements-sweep.txt
	touch $@

clean:
	rm -rf $(VENV)
