"""In the shape of pretrain_hybrid.py, see pretrain_wheel.py: HybridModel with the same data, batches and loss."""

import pretrain_wheel
from megatron.training.argument_utils import hybrid_config_from_args

if __name__ == "__main__":
    pretrain_wheel.main(hybrid_config_from_args)
