//! Changes names that a reader has already seen.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::base_rows;
use super::chance::{Subject, dice};
use super::deployment::{Deployment, Preset, Template};
use super::script::Script;
use super::truth::Rename;

pub(super) async fn rename_things(
    tx: &mut PgConnection,
    script: &mut Script,
    at: DateTime<Utc>,
) -> anyhow::Result<Vec<Rename>> {
    let mut done = Vec::new();
    let round = script.books.renames.len();
    let renamed = |name: &str| format!("{name}-renamed-{round}");

    if let Some(id) = script.deployment.organizations.last().map(|organization| organization.id) {
        let (from, to) = renaming(script, id, renamed);
        sqlx::query("update organizations set name = $2, updated_at = $3 where id = $1")
            .bind(id)
            .bind(&to)
            .bind(at)
            .execute(&mut *tx)
            .await?;
        done.push(Rename::Organization { id, from, to });
    }
    if let Some(id) = script.deployment.templates.first().map(|template| template.id) {
        let (from, to) = renaming(script, id, renamed);
        sqlx::query("update templates set name = $2, updated_at = $3 where id = $1")
            .bind(id)
            .bind(&to)
            .bind(at)
            .execute(&mut *tx)
            .await?;
        done.push(Rename::Template { id, from, to });
    }
    let first = remaining_presets(script).next().map(|preset| preset.id);
    if let Some(id) = first {
        let (from, to) = renaming(script, id, renamed);
        sqlx::query("update template_version_presets set name = $2 where id = $1")
            .bind(id)
            .bind(&to)
            .execute(&mut *tx)
            .await?;
        done.push(Rename::Preset { id, from, to });
    }
    let last = remaining_presets(script).last().map(|preset| preset.id);
    if let Some(id) = last {
        sqlx::query("delete from template_version_presets where id = $1")
            .bind(id)
            .execute(&mut *tx)
            .await?;
        script.books.removed_presets.insert(id);
        done.push(Rename::PresetRemoved {
            id,
            name: script.books.names.get(&id).cloned().unwrap_or_default(),
        });
    }
    if let Some(id) = script.books.any_workspace() {
        let to = format!("workspace-renamed-{round}");
        sqlx::query("update workspaces set name = $2, updated_at = $3 where id = $1")
            .bind(id)
            .bind(&to)
            .bind(at)
            .execute(&mut *tx)
            .await?;
        done.push(Rename::Workspace { id, to });
    }
    done.extend(replace_template(tx, script, at).await?);
    Ok(done)
}

/// Notes a new name. Returns the old and the new one.
fn renaming(script: &mut Script, id: Uuid, renamed: impl Fn(&str) -> String) -> (String, String) {
    let name = script.books.names.entry(id).or_default();
    let to = renamed(name);
    (std::mem::replace(name, to.clone()), to)
}

/// Presets with a row, of the active versions of lasting templates.
fn remaining_presets(script: &Script) -> impl Iterator<Item = &Preset> {
    let versions = script
        .deployment
        .templates
        .iter()
        .filter(|template| !template.sunset)
        .filter_map(|template| template.versions.last());
    versions
        .flat_map(|version| &version.presets)
        .filter(|preset| !script.books.removed_presets.contains(&preset.id))
}

/// Deletes the sunset template, which coderd allows once it has no workspaces, and gives its name
/// to a new one.
async fn replace_template(
    tx: &mut PgConnection,
    script: &mut Script,
    at: DateTime<Utc>,
) -> anyhow::Result<Option<Rename>> {
    let Some(place) = script
        .deployment
        .templates
        .iter()
        .position(|template| template.sunset && !script.books.has_workspaces(template.id))
    else {
        return Ok(None);
    };
    let old: Template = script.deployment.templates.remove(place);
    sqlx::query("update templates set deleted = true, updated_at = $2 where id = $1")
        .bind(old.id)
        .bind(at)
        .execute(&mut *tx)
        .await?;
    let mut dice = dice(script.config.seed, Subject::Deployment);
    dice.set_word_pos(1 << 20);
    let new = Deployment::successor(&old, &mut dice);
    base_rows::template(tx, script.config.schema, &script.deployment, &new, at).await?;
    script.books.add_template(&new);
    let rename = Rename::TemplateReplaced { id: old.id, successor: new.id, name: new.name.clone() };
    script.deployment.templates.push(new);
    Ok(Some(rename))
}
