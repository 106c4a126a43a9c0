"""What a pruned network still knows, without labels: fastscore's choice and repair beside Torch-Pruning's."""
