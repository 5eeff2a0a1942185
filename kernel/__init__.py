"""The ground floor: index, lookup, scores and top-k over packed records. Imports nothing of ours."""
