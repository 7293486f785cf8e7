from .initialisers import initialiser
