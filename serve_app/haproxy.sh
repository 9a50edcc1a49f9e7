#!/bin/sh
# HAProxy as Ray Serve starts it, with changes to the configuration Serve has written. Serve takes
# this file for HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH); MANTA_HAPROXY is the real one.
#
# Its statistics and metrics pages, which Serve binds to every interface and which ask for no token,
# are only reached from this machine.
#
# Bodies of requests are not spliced: HAProxy 2.8 no longer notices that a client has left once it
# has spliced its body, which it does when the body comes in a later packet than the headers. All
# of 8 such requests for a whole answer ran to their end, none does without.
#
# A request is sent to a replica once all of it is here: HAProxy tries one again elsewhere only if it
# had the whole of it at the first try, and many clients send the body in a later packet.
#
# When no replica can be reached, the answer is 503 with Retry-After in the API's own shape, and not
# the plain 500 that Serve makes of 502, 503 and 504; nor 404, while Serve has not told a new HAProxy
# of any application; nor 500, when a request waited in Serve's fallback proxy for a replica and that
# died as well. Our own errors are JSON.
#
# An HAProxy that outlived the actor which started it holds the port: the next one takes over from it,
# and its streams go on.

not_ours="{ status 500 } !{ res.hdr(content-type) -m beg application/json }"
previous=
reload=
orphans=
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        # Beside the configuration, whose directory is ours: a path of the user's may hold spaces.
        unavailable=$(dirname "$argument")/unavailable.http
        cp "$(dirname "$0")/unavailable.http" "$unavailable" || exit 1
        rule="http-response return status 503 errorfile $unavailable if $not_ours"
        # "bind :9101" and "bind *:8404"; a frontend's line names its host
        sed -i -e 's/^\( *bind \)\**:\([0-9]\)/\1127.0.0.1:\2/' \
            -e 's/^\( *option \)splice-request$/\1http-buffer-request/' \
            -e "s|^\( *errorfile 50[234] \).*|\1$unavailable|" "$argument" || exit 1
        if grep -Eq '^ *bind +\*?:[0-9]' "$argument"; then
            echo "$0: $argument still binds a port of every interface" >&2
            exit 1
        fi
        sed -i "/^frontend http_frontend/a $rule" "$argument" || exit 1
        if ! grep -q '^ *use_backend ' "$argument"; then
            sed -i "s|\( *http-request return status \)404 .*|\1503 errorfile $unavailable|" \
                "$argument" || exit 1
        fi
        for path in $(grep -alsF -- "$argument" /proc/[0-9]*/cmdline); do
            pid=${path#/proc/}
            pid=${pid%/cmdline}
            [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = haproxy ] && orphans="$orphans $pid"
        done
    fi
    [ "$argument" = -sf ] && reload=yes
    previous=$argument
done
if [ -n "$orphans" ] && [ -z "$reload" ]; then
    # shellcheck disable=SC2086
    set -- "$@" -sf $orphans
fi
exec "$MANTA_HAPROXY" "$@"
