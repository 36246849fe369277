"""Files of others read strictly, ours written all or nothing."""
