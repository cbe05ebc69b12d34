import pytest
import torch

import common


@pytest.fixture(scope="session")
def driver():
    """The C++ side, kept running for the whole session."""
    if not common.Driver.executable().exists():
        pytest.fail(f"{common.Driver.executable()} is missing: build the target parity_driver first")
    torch.set_num_threads(1)  # the reference's tensors are tiny
    running = common.Driver()
    yield running
    running.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """name -> (transformers model, its folder). A test that changes a model makes its own copy."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            made[name] = (common.make_model(name, folder), folder)
        return made[name]

    return get
