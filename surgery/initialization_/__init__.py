"""TODO initialization_"""
