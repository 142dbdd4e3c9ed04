"""Unimodal pretraining of the two tiny encoders that ship with the project: ``python -m train.embedded.pretrain vit|bert``."""
