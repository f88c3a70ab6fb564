"""Log-probability and entropy of tokens from hidden states; logits exist block by block only."""
