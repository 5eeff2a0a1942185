"""What others would write or take in place of RankTower, as good as it would be in production."""
