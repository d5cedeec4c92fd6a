"""Loss scaling and FP32 master weights for PyTorch. Importing this needs torch alone."""

from mpcore.amp import GradScaler as GradScaler
from mpcore.cast_model import cast_model as cast_model  # its module, so that no import hides it
from mpcore.comparison.compare import compare as compare
from mpcore.comparison.result import Comparison as Comparison
from mpcore.comparison.training_run import TrainingRun as TrainingRun
from mpcore.engine import MixedPrecisionOptimizer as MixedPrecisionOptimizer
from mpcore.engine import StepResult as StepResult
from mpcore.engine import step_scheduler as step_scheduler
from mpcore.errors import ArgumentError as ArgumentError
from mpcore.errors import ArgumentTypeError as ArgumentTypeError
from mpcore.errors import BackendError as BackendError
from mpcore.errors import LossScaleError as LossScaleError
from mpcore.errors import MpcoreError as MpcoreError
from mpcore.errors import RankError as RankError
from mpcore.errors import StageError as StageError
from mpcore.loss_scale import DynamicLossScale as DynamicLossScale
from mpcore.loss_scale import HeadroomLossScale as HeadroomLossScale
from mpcore.loss_scale import LossScale as LossScale
from mpcore.loss_scale import NoLossScale as NoLossScale
from mpcore.loss_scale import StaticLossScale as StaticLossScale
from mpcore.monitoring.monitor import Monitor as Monitor
from mpcore.monitoring.preflight import preflight as preflight
from mpcore.monitoring.report import OverflowReport as OverflowReport
from mpcore.monitoring.sinks import JsonLines as JsonLines
from mpcore.monitoring.sinks import MLflow as MLflow
from mpcore.monitoring.sinks import TensorBoard as TensorBoard
from mpcore.monitoring.sinks import WeightsAndBiases as WeightsAndBiases
from mpcore.monitoring.trace import trace_overflow as trace_overflow
from mpcore.optim import AveragedModel as AveragedModel
from mpcore.precision import LayerNorm as LayerNorm
from mpcore.precision import Policy as Policy
from mpcore.precision import RMSNorm as RMSNorm
from mpcore.precision import cast_report as cast_report
from mpcore.precision import emulate_tensor_cores as emulate_tensor_cores
from mpcore.precision import global_policy as global_policy
from mpcore.precision import set_global_policy as set_global_policy
from mpcore.precision import use_policy as use_policy
from mpcore.ranks import Ranks as Ranks

__version__ = "0.1.0"
