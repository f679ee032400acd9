"""The stages of the recipe that train or package."""
