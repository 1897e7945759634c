"""Local SGD among workers that come and go, on torchft's lighthouse and process groups."""

from lightning_adpsgd.elastic.local_sgd import ElasticLocalSGD
from lightning_adpsgd.elastic.options import ElasticOptions

__all__ = ["ElasticLocalSGD", "ElasticOptions"]
