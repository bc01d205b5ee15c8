"""The mathematics of surgeon: plain functions on tensors that know nothing of graphs, passes or models."""

from surgeon.numerics.assignment import align_neurons as align_neurons
from surgeon.numerics.clustering import Clustering as Clustering
from surgeon.numerics.clustering import balanced_assignment as balanced_assignment
from surgeon.numerics.clustering import balanced_kmeans as balanced_kmeans
from surgeon.numerics.clustering import members as members
from surgeon.numerics.errors import NumericsError as NumericsError
from surgeon.numerics.lowrank import LowRank as LowRank
from surgeon.numerics.lowrank import rank_for_ratio as rank_for_ratio
from surgeon.numerics.lowrank import saves as saves
from surgeon.numerics.lowrank import truncated_svd as truncated_svd
from surgeon.numerics.lowrank import whitened_svd as whitened_svd
from surgeon.numerics.quantization import QuantizedTensor as QuantizedTensor
from surgeon.numerics.quantization import dequantize as dequantize
from surgeon.numerics.quantization import dynamic_quantize_linear as dynamic_quantize_linear
from surgeon.numerics.quantization import fake_quantize_dynamic as fake_quantize_dynamic
from surgeon.numerics.quantization import pack_codes as pack_codes
from surgeon.numerics.quantization import quantize_groupwise as quantize_groupwise
from surgeon.numerics.quantization import unpack_codes as unpack_codes
from surgeon.numerics.router import centroid_router as centroid_router
from surgeon.numerics.router import ridge_regression as ridge_regression
from surgeon.numerics.router import train_linear_router as train_linear_router
