"""Every operation that has a Triton kernel. A new one is a line in KERNELS.

Authors
 * The sb_memeff authors 2026
"""

from tests.unittests.ops.grid_kernels import (
    ADD_AND_CONVERT,
    ADD_ON_GRID,
    ROUND_TO_GRID,
    SUBTRACT_ON_GRID,
    SUMMARIZE,
)
from tests.unittests.ops.kernels_8bit import QUANTIZE, step_of
from tests.unittests.ops.norm_relu_kernels import (
    BATCH_STATISTICS,
    NORM_RELU,
    NORM_RELU_BACKWARD,
)
from tests.unittests.ops.transducer_kernels import (
    ADD_INPUT_GRADIENTS,
    FORWARD_BACKWARD,
    JOIN,
    ROW_GRADIENT,
    ROW_SCORES,
)
from tests.unittests.optim.optimizers import CLASSES

KERNELS = {
    "row_scores": ROW_SCORES,
    "row_gradient": ROW_GRADIENT,
    "forward_backward": FORWARD_BACKWARD,
    "join": JOIN,
    "add_input_gradients": ADD_INPUT_GRADIENTS,
    "round_to_grid": ROUND_TO_GRID,
    "add_on_grid": ADD_ON_GRID,
    "subtract_on_grid": SUBTRACT_ON_GRID,
    "summarize": SUMMARIZE,
    "add_and_convert": ADD_AND_CONVERT,
    "batch_statistics": BATCH_STATISTICS,
    "norm_relu": NORM_RELU,
    "norm_relu_backward": NORM_RELU_BACKWARD,
    "quantize": QUANTIZE,
    **{ours.__name__: step_of(kind) for ours, kind in CLASSES.items()},
}
