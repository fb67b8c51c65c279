use super::*;

#[test]
fn the_document_has_every_path_and_names_every_schema_it_refers_to() {
    let document = serde_json::to_value(document()).unwrap();
    let paths = document["paths"].as_object().unwrap();
    for path in [
        "/v1/version",
        "/v1/health",
        "/v1/templates",
        "/v1/templates/{name}",
        "/v1/templates/{name}/reload",
        "/v1/forks",
        "/v1/forks/{id}",
        "/v1/forks/{id}/exec",
        "/v1/forks/{id}/snapshot",
        "/v1/forks/{id}/console",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let text = document.to_string();
    for reference in text.split("#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(schemas.contains_key(name), "{name}");
    }
}
