"""Former home of `fastdeploy_lite.models`; scripts import the registry from here."""
