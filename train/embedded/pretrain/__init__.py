"""Unimodal pretraining of the two tiny encoders that ship: ``python -m train.embedded.pretrain vit|bert``."""
