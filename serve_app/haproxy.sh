#!/bin/sh
# HAProxy as Ray Serve starts it, but its statistics and metrics pages, which Serve binds to every
# interface and which ask for no token, are only reached from this machine. Serve takes this file
# for HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH); MANTA_HAPROXY is the real one.

previous=
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        # "bind :9101" and "bind *:8404"; a frontend's line names its host
        sed -i 's/^\( *bind \)\**:\([0-9]\)/\1127.0.0.1:\2/' "$argument" || exit 1
    fi
    previous=$argument
done
exec "$MANTA_HAPROXY" "$@"
