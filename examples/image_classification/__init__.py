"""Image classification with periodic averaging: the models, the data and one configuration per strategy."""

from examples.image_classification.data import FolderData, ImageData
from examples.image_classification.model import ImageClassifier

__all__ = ["FolderData", "ImageClassifier", "ImageData"]
