"""The part of KubeRay's RayService (ray.io/v1) that our manifest uses, as a strict JSON schema.

Written from the API's description; a field that is not here is refused. The whole definition of a
KubeRay release is taken instead where a file of it is given (tests/test_kuberay.py).
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?([KMGT]i|[mkMGT])?$"}


def fields(*required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def mapped(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


CONTAINER = fields(
    "name",
    name=TEXT,
    image=TEXT,
    env=listed(fields("name", name=TEXT, value=TEXT)),
    ports=listed(fields("containerPort", containerPort=COUNT, name=TEXT)),
    resources=fields(limits=mapped(QUANTITY), requests=mapped(QUANTITY)),
    volumeMounts=listed(fields("name", "mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = fields(
    "name",
    name=TEXT,
    persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly=FLAG),
    emptyDir=fields(medium=TEXT, sizeLimit=QUANTITY),
)
POD = fields(
    "spec",
    spec=fields(
        "containers",
        containers=listed(CONTAINER),
        volumes=listed(VOLUME),
        tolerations=listed(fields(key=TEXT, operator=TEXT, effect=TEXT)),
        terminationGracePeriodSeconds=COUNT,
    ),
)
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(idleTimeoutSeconds=COUNT),
    headGroupSpec=fields("template", rayStartParams=mapped(TEXT), template=POD),
    workerGroupSpecs=listed(
        fields(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=mapped(TEXT),
            template=POD,
        )
    ),
)
RAY_SERVICE = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=fields("name", name=TEXT),
    spec=fields(
        serveConfigV2=TEXT,
        rayClusterConfig=CLUSTER,
        serviceUnhealthySecondThreshold=COUNT,
        deploymentUnhealthySecondThreshold=COUNT,
    ),
)
